"""`ftload verify`: what lies in a directory, compared with its report."""
