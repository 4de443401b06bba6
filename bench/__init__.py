"""What Tablecast costs and gains, compared with what people would build instead."""
