"""The demo: find wrong labels, look up passages, check the numbers, write a report."""
