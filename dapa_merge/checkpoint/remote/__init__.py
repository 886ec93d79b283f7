"""Models on the Hub, of which only what is read is fetched."""
