"""COCO data sets: checked, fetched, drawn, cut."""
