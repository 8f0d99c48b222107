"""What runs the service elsewhere: files for those who operate it, and what writes them."""
