"""What is done by hand, beside the server; and what is made of its source."""
