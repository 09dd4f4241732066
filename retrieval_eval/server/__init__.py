"""`videomamba serve`: a page and a JSON API over an index, for the machine it runs on.

address.py   where it listens, and the token, settled first
run.py       the command's work: open the collection, say where it is, serve until Ctrl-C
app.py       routes, and every failure as JSON with a reason
api.py       the API's handlers         engine.py     from a query to its hits, as JSON
pages.py     the page's files           login.py      the token, and the cookie that stands for it
guard.py     what every request goes through: host, origin, token, headers
protocol.py  what one connection may take of time and memory
requests.py  what a request says        refusals.py   what it may be refused for
uploads.py   a clip's bytes, bounded    decoding.py, decode_process.py   its frames, where a decoder may crash
worker.py    the model's one thread     media.py      byte ranges of a medium in a shard
limits.py    every bound                openapi.py    the API's own description
"""
