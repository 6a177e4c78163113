"""The training half: from a trained PyTorch network to a bundle that is served as it was evaluated."""
