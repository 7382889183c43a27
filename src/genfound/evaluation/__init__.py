"""Samples, references and figures, with the protocol they were measured under."""
