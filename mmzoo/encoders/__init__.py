"""What turns pixels into patch features."""
