"""Stored formats, one file each: what is decoded, against the library that defines it."""
