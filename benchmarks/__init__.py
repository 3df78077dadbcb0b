"""Measurements side by side with every installed peer."""
