"""What many runs say together: laws of loss, size and data, fitted, with intervals, and what they advise."""
