"""What train.py and test.py share."""
