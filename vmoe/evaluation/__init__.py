"""How good a model is: its accuracy on a set, what its features know, and its runs beside others."""
