"""What looks at a run or an engine and says whether its numbers can be trusted."""
