"""The report page: figures and episodes of a day as one HTML file."""
