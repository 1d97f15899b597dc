"""What the README and the pages of docs/ say, and that it holds."""
