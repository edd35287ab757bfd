"""A page in the browser over trained models: computing on a model, and the page that shows it.

`loading` opens a run. `codes`, `answers` and `neighbours` compute pictures and numbers; `uploads` reads the user's images.
`server` answers the page, whose files are `page.html`, `page.css` and `page.js`.
"""
