"""Calls timed side by side, their memory, and the machine that they ran on."""
