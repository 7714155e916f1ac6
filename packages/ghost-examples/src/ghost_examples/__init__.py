"""The demo of ghost, and examples to start from. Nothing here is downloaded."""
