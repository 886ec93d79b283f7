"""Cards, locks and commits on the Hub."""
