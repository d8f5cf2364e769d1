"""Where a response is cut into steps, which steps matter, and the tree that branches there."""
