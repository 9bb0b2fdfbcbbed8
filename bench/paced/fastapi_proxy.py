"""What most people write: a FastAPI route that passes an upstream's stream on with httpx. Runs in the peer's Python.

`python fastapi_proxy.py PORT UPSTREAM`
"""

import sys

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

app = FastAPI()
client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None, max_keepalive_connections=20))


@app.post("/v1/chat/completions")
async def chat(request: Request):
    body = await request.json()
    url = f"{sys.argv[2]}/v1/chat/completions"
    if not body.get("stream"):
        answer = await client.post(url, json=body)
        return Response(answer.content, media_type="application/json")
    upstream = await client.send(client.build_request("POST", url, json=body), stream=True)

    async def passed_on():
        async for chunk in upstream.aiter_raw():
            yield chunk
        await upstream.aclose()

    return StreamingResponse(passed_on(), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", loop="uvloop", http="httptools")
