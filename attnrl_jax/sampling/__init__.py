"""Sampling responses: a decode cache, a functional engine, and requests on top of it."""
