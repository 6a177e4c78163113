"""ONNX surgery as pure functions: a ModelProto goes in, facts or another ModelProto come out."""
