"""One run on a GPU that says what meets its goals."""
