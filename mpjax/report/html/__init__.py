"""A report as one HTML page that needs nothing else; `page.css` and `page.js` go into it."""
