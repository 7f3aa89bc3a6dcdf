"""What matters: statistics in, scores of a weight's shape out, and masks chosen by them."""
