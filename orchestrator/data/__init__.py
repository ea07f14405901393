"""COCO data sets: check, begin an experiment, split, correct names, fetch, generate and excerpt."""
