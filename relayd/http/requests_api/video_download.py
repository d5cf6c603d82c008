"""`GET /v1/requests/{id}/video`: the pictures of a request as IVF, sent as they are made."""

from starlette.requests import Request as HttpRequest

from protocol.wire.ivf import IVF, ivf_header
from relayd.http.media_stream import VIDEO, open_media
from relayd.http.request_stream import find_result, open_reader, wait_safe
from relayd.http.requests_api.audio_download import check_result
from relayd.http.streaming_response import ResponseWriter


async def send_video(http: HttpRequest, reply: ResponseWriter) -> None:
    """Send the video from its first picture on."""
    request = find_result(http, http.path_params["request_id"])
    await wait_safe(http, request)
    check_result(request)
    async with open_reader(http, request) as held:
        video = await open_media(held, VIDEO)
        picture = await video.next()  # before any, a new attempt may have another format
        await reply.start(IVF, headers={"accept-ranges": "none"})
        if http.method == "HEAD":
            return
        await reply.write(ivf_header(video.format))
        while picture is not None:
            await reply.write(picture)
            picture = await video.next()
