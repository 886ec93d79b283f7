"""What has to do with the Hub as a place to publish to, and as the place where models move."""
