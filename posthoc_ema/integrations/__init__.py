"""Thin files over the public interface, one for each training framework."""
