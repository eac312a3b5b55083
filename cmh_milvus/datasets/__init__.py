"""Paired image-text data: benchmark loaders, generic loaders, and the split over them."""
