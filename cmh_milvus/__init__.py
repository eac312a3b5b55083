"""Learned cross-modal hash codes for pictures and texts, served from Milvus."""
