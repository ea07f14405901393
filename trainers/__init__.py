"""The worker room: trains and measures one trial on one rank. Knows Ray Train, torch, detectron2; never MLflow."""
