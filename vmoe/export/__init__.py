"""What a trained model is turned into for others to use."""
