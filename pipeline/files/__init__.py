"""Files that survive a power failure, and whose damage is noticed."""
