"""What Tablecast costs and gains, measured beside what people would build instead."""
