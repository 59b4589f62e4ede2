"""Retune keeps the soft prompts of a frozen language model in tune with incoming data."""
