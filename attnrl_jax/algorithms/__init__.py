"""What the tree is worth: adaptive filters, advantages and the policy-gradient loss."""
