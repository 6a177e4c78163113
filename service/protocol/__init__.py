"""One file per wire: bytes to `Accepted`, outputs to bytes."""
