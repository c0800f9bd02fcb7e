"""What a trained model is written as for others: programs, weights, folders for the hub."""
