"""COCO data sets: check, fetch, generate and excerpt."""
