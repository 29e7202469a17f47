"""`ftload doctor`: what this machine can do."""
