"""What a recipe exchanges: faster versions of parts of detectron2."""
