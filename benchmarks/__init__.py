"""This program and plain detectron2, side by side on the same work."""
