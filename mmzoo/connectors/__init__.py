"""What turns encoder features into visual tokens."""
