"""What frozen features are worth: kNN and linear evaluation."""
