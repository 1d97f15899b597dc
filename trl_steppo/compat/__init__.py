"""What this package uses of other libraries beyond their documented interfaces: one module for each library."""
