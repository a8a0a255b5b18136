"""Operators in plain C, compiled once for this processor and called through ctypes with raw pointers."""
