"""The HTML report: its page, figures and images."""
