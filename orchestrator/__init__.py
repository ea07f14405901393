"""The driver room: decides, places, remembers and tells. Imports neither torch nor detectron2."""
