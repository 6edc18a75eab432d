"""Picking: recipes, the methods that carry them out, and the solver that writes them."""
