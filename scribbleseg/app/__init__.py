"""The page to draw on: a small server on loopback, and a page of plain HTML, JS and CSS.

```
folder.py    the data-contract folder that is drawn into; nothing outside it is touched
arrivals.py  photographs that come in, made to keep that contract
sheets.py    the pictures that are open: decoded once, with their strokes and these strokes' past
models.py    checkpoints as the page uses them: a quick look for every stroke, a careful one to keep
remote.py    the same, over HTTP, by a deployed predictor
proposals.py which picture to draw on next
training.py  the command that trains on what was accepted
studio.py    what the routes do with all of these
hosts.py     the names under which it is reached
guard.py     who may talk to the server
server.py    the routes; serve.py the command
page/        what the browser gets
```
"""
